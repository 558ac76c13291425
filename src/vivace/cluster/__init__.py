"""Ray: a cluster of this machine's own or one that is there, and work spread over its GPUs. Needs the extra [ray]."""
