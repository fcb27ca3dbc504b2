//! The wallaby command.
