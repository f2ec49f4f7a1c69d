"""Does a run fit a TPU slice, how fast will it be, what will it cost? The TPU compiler answers; it needs no TPU."""
