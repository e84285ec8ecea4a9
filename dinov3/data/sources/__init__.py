"""Where images come from: a folder, a file, a list, tar shards, Parquet, a saved `datasets` folder; one by one, by name.

`open_source` detects what a path is and lists what it holds; nothing is decoded and no container is read as a whole. The
list is deterministic and small (about 40 bytes a file: no object, no `stat`), and every `Item` of it is picklable and
readable on its own, in any thread or process:

    for item in open_source("photos/"):
        data = item.read()          # bytes, or ImageError with the reason

Nothing disappears in silence. What looks like an image and cannot be read (a dangling link, the rest of a truncated
shard, an empty cell) is an item whose `read` fails with the reason, so that it ends in somebody's list of failures; what
is no image is counted in `source.skipped`. Hidden files and folders (".name") are left alone, as `ls` does.

What random access costs: a file or a member of a plain tar is one read at an offset. A member of a .tar.gz is found by
decompressing up to it, a Parquet row by decoding its row group up to it: 8 to 2,400 ms an image in random order where 0.3 ms
is usual. Each process keeps the last 256 MB of what it decompressed and the places where it stopped (`items.Forward`), and
`runs` tells the training loader which images lie in a row.

Left out: remote addresses (mount or copy first), zip and other archives, and what accompanies an image (captions, labels).
"""

from dinov3.data.sources.items import Item, Place
from dinov3.data.sources.listing import Source, files_below, open_source, open_sources, read_stored, videos_left_out

__all__ = ["Item", "Place", "Source", "files_below", "open_source", "open_sources", "read_stored", "videos_left_out"]
