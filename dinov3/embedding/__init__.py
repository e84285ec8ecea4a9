"""Embedding many images: `store` keeps the vectors, `search` finds neighbours, `pipeline` fills the store.

Nothing is imported here: `import dinov3.embedding` must not cost LanceDB.
"""
