"""Network counters around a case: what each NIC carried, and what TCP retransmitted."""
