"""Moving pages between the pool and the tiers: what, when, and how."""
