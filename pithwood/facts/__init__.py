"""What can be said about runs and settings, as plain data: no printing, no drawing, no file is written.

Commands print these numbers, `observe` draws them, reports reuse them. Everything returned is made of dicts, lists,
strings and numbers, so that it can be written as JSON as it stands.
"""
