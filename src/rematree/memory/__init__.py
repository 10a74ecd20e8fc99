"""What lives on the device: a ledger of every allocation, and the rules of the allocator."""
