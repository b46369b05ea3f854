"""What ``optserve`` can be told to do, a module for each command; what is slow is imported late."""
