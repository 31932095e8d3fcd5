"""Released coders: where they lie, how files of strangers are read, and the table of what has been released.

`places` and `remote` (a folder, a hub repository) give files; `weights` with `archives`, `pickles`, `foreign`, `ranged`
and `digests` reads them without trust; `releases` knows names; `outline`, `card`, `converting` and `exporting` look at
a coder without its weights, describe it, and write it in other formats.
"""
