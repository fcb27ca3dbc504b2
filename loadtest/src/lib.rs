//! Load generator, benchmark harness and side-by-side reports.
