//! Whole-system tests: processes, faults, chaos.
