"""From a model and a batch to a `Plan`: measure what options cost (`survey`), search, confirm with the referee."""
