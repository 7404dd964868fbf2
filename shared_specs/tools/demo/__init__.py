"""The demonstration behind `psa demo`: dense, pyramid and binary masks on a real video clip."""
