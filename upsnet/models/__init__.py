"""The network, one part a file. Parts take plain arguments: they know no recipe, no data set and no engine."""
