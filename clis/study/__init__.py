"""Tables of several runs: the file that says which, the processes, the record, its tables and figure."""
