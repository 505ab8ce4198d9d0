"""How the work is carried out: convolutions, sharding over devices, several processes."""
