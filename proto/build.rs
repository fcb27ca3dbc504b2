//! Generates the `wallaby.v1` types, clients and servers, and the descriptor set that reflection serves.
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let mut files: Vec<PathBuf> = std::fs::read_dir("proto/wallaby/v1")?
        .filter_map(|entry| entry.ok().map(|e| e.path()))
        .filter(|path| path.extension().is_some_and(|ext| ext == "proto"))
        .collect();
    files.sort();
    tonic_prost_build::configure()
        .file_descriptor_set_path(out.join("wallaby_v1.bin"))
        .compile_protos(&files, &[PathBuf::from("proto")])?;
    Ok(())
}
