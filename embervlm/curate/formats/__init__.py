"""Formats of other data sets, a function each: one value of a file -> records in one of the guide's spellings."""
