"""The norms' arithmetic: `reference` defines it, back ends compute it faster, `dispatch` chooses."""
