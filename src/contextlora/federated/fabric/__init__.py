"""What carries a federation's messages: many devices in one process (`local`), or one real device (`zenoh`)."""
