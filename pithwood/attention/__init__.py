"""Token mixers: one file each, with its configuration, its module, its cache fields and its cost."""
