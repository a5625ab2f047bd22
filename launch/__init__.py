"""How processes start: one agent a node, which starts the node's ranks and watches them."""
