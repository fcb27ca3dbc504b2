//! The log of a flow: one JetStream stream, one writer at a time, any number of readers.
