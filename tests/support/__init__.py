"""What several tests build, compare and break; no test module imports another one."""
