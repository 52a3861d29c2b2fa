"""The norms' arithmetic: `reference` defines it, back ends compute it faster, and `dispatch` chooses a back end."""
