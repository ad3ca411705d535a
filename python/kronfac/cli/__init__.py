"""The command line: `kronfac demo | train | spectrum | info`."""
