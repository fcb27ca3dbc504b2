//! The control plane: API, scheduler, conditions.
