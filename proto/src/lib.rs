//! The `wallaby.v1` API: messages, clients and servers generated from the `.proto` files under `proto/`.
#![allow(missing_docs, reason = "generated; the .proto files carry the comments")]
#![allow(clippy::all, reason = "generated")]

/// Messages and services of the `wallaby.v1` package.
pub mod v1 {
    tonic::include_proto!("wallaby.v1");
}

/// The encoded `FileDescriptorSet`, for gRPC reflection.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/wallaby_v1.bin"));
