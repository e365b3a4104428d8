"""How bytes move: keys, messages, shared memory, streams and process groups."""
