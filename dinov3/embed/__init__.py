"""Embedding many pictures: `store` keeps the vectors, `search` finds neighbours, `pipeline` fills the store.

Nothing is imported here: `import dinov3.embed` must not cost LanceDB.
"""
