"""How fast a step is: against plain sockets, peers, and the promises of issue 4."""
