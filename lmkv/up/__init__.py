"""Everything of lmkv on one machine: processes started, watched and ended. The scripts use it, too.

All but `plan` needs nothing but the standard library.
"""
