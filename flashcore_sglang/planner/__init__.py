"""From CSR page tables to work rows, tiles and a schedule: one file a policy."""
