"""The report of `kronfac demo`: figures and one self-contained page."""
