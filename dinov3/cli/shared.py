"""What commands share: the application they register with, common options, progress and messages on stderr."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer
from typer.core import TyperGroup

from dinov3.errors import DinoError, printable, without_secrets

UNREADABLE, INTERRUPTED = 3, 130


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        """A command. Ctrl-C is one sentence; Typer is silent."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            log(f"interrupted{f': {error}' if str(error) else ''}; the same command starts again or continues")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Commands,
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="DINOv3: embed and search images; segment, measure, fit heads, train, distil.",
    epilog="Environment: DINOV3_MAX_IMAGE_MB, the largest image file that is read (512); DINOV3_CACHE, folder of downloads.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
FILE = re.compile(r".+\.(csv|tsv|txt|json|yaml|png|jpe?g|tiff?|npy|npz|pth?|safetensors)", re.IGNORECASE)

Shape = Literal["square", "short", "long", "native"]
Fit = Literal["resize", "pad", "crop"]
Pooling = Literal["cls", "mean", "cls+mean"]
Patches = Literal["none", "float16", "float32", "int8"]
Dtype = Literal["float32", "bfloat16", "float16"]


def _print_version(wanted: bool) -> None:
    if wanted:
        import dinov3

        print(dinov3.__version__)
        raise typer.Exit()


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", "-V", help="Print the version.", callback=_print_version)
    ] = False,
) -> None:
    """DINOv3: embed and search images; segment, measure, fit heads, train, distil."""


def is_first() -> bool:
    """Whether no launcher started this process, or as the first of several. (Knows it without torch.)"""
    return (os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0") == "0"


def log(text: str) -> None:
    """A line on stderr, of the first of several processes."""
    if not is_first():
        return
    print(printable(without_secrets(text), lines=True), file=sys.stderr, flush=True)


def log_model(net: Any, random: str, *facts: Any) -> None:
    """A model's origin, form, device and further facts; `random`: what random weights mean for the results."""
    parameter = next(net.parameters())
    form = getattr(net, "form", None) or str(parameter.dtype).removeprefix("torch.")
    log("; ".join(map(str, (f"{net.origin}, {form} on {parameter.device}", *facts))))
    if net.origin.random:
        log(f"The weights are RANDOM: {random}")
    for note in net.origin.notes:
        log(f"note: {note}")


def log_failures(failures: Sequence[tuple[str, str]], more: str = "") -> None:
    """The first twenty images that could not be read, with their reasons."""
    for path, reason in failures[:20]:
        log(f"could not read {printable(path)}: {reason}")
    if len(failures) > 20:
        log(f"… and {len(failures) - 20} more{more}")


def log_away(folders: Mapping[str, int], store: str) -> None:
    """The source folders that are not there, whose images stay in the store."""
    for folder, count in folders.items():
        state = "empty" if os.path.isdir(folder) else "not there"
        log(
            f"{count} images are under {printable(folder)}, which is {state}: kept. Mount its disk, or embed the folder from "
            f"where it is now; `dinov3 store prune {store} --missing-sources` removes them"
        )


def device_of(name: str) -> str:
    from dinov3 import hub

    return hub.device_of(name)


def batch_of(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"a positive number or 'auto', not {text!r}", param_hint="--batch")
    return int(text)


def result_folder(path: Path | None) -> Path | None:
    """Callback of options for a folder of results. Raises for a file's name: who writes `--out c.csv` expects a table."""
    if path is not None and FILE.fullmatch(path.name) and not path.is_dir():
        raise DinoError(
            f"{path} is the name of a file, but results go into a folder: name one, such as {path.with_suffix('')}"
        )
    return path


RunFolder = Annotated[Path, typer.Option(help="The run's folder. Run again to resume.", callback=result_folder)]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto.")]


def config_options(cls: type[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: the fields of a configuration class that have a help text become options of a command.

    The command receives them as one `config`; parameters of its own win over fields of the same name. Defaults, choices
    and smallest values are the fields'.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "config"]
        taken, hints = {p.name for p in own}, get_type_hints(cls)
        fields = [f for f in dataclasses.fields(cls) if f.metadata.get("help") and f.name not in taken]

        def run(**given: Any) -> None:
            values = {f.name: given.pop(f.name) for f in fields}
            command(config=cls(**values), **given)

        options = [_parameter(f, hints[f.name]) for f in fields]
        parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in own] + options
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _parameter(field: dataclasses.Field[Any], hint: Any) -> inspect.Parameter:
    bounds = field.metadata
    flags = (
        [bounds["flag"]] if bounds["flag"] else [] if field.default is True else ["--" + field.name.replace("_", "-")]
    )
    option = typer.Option(*flags, help=bounds["help"], min=bounds["at_least"], max=bounds["at_most"])
    factory: Any = field.default_factory
    default = field.default if field.default is not dataclasses.MISSING else factory()
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(field.name, kind, default=default, annotation=Annotated[hint, option])


class Progress:
    """A bar with rate and time left on a terminal; elsewhere a line after two seconds and every half minute.

    A step that reports nothing (without `total`, or at the end of the others) shows the seconds that have passed.
    """

    wait = 2.0  # s until the next line

    def __init__(self, label: str, total: int | None = None) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.total, self.label = total, label
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn(label),
            BarColumn(),
            *([MofNCompleteColumn()] if total is not None else []),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn() if total is None else TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=total is None,
        )
        self.last = self.start = time.monotonic()
        self.ended = threading.Event()

    def __enter__(self) -> Progress:
        self.bar.start()
        self.task = self.bar.add_task(self.label, total=self.total, rate="")
        if not self.console.is_terminal:
            threading.Thread(target=self._silent_steps, daemon=True).start()
        return self

    def _silent_steps(self) -> None:
        wait = self.wait
        while not self.ended.wait(wait + 0.5):  # later than a line that is due
            now = time.monotonic()
            if now - self.last > max(wait, self.wait):  # which a line of counts makes longer
                wait = 30.0
                log(f"{self.label} · {now - self.start:.0f} s")

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.bar.stop()

    def __call__(self, done: int, rate: float | None = None) -> None:
        """`done` images in all; `rate` a second, default: counted here."""
        now = time.monotonic()
        if rate is None:
            rate = done / max(now - self.start, 1e-9)
        self.bar.update(self.task, completed=done, rate=f"{rate:.1f} images/s")
        if self.total is not None and not self.console.is_terminal and now - self.last > self.wait:
            self.last, self.wait = now, 30.0
            left = (self.total - done) / max(rate, 1e-9)
            ahead = f" · {rate:.1f} images/s · {f'{left:.0f} s' if left < 90 else f'{left / 60:.0f} min'} left"
            log(f"{done} of {self.total}{ahead if rate > 0 else ''}")
