"""Models without weights: shapes known by name, config files, and modules on the meta device made from them."""
