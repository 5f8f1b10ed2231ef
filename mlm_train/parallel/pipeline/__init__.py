"""Pipeline parallelism: stages, schedules, and the transport of x0 to every stage."""
