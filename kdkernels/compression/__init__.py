"""Teachers' distributions as few entries: choosing them (`select`), packing them (`codec`, `format`), keeping them on
disk (`cache`).

Importing this package, `codec` and `format` needs no torch: data workers decode a cache with numpy alone.
"""
