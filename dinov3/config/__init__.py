"""Strict configurations: dataclasses, YAML files, dotted overrides."""
