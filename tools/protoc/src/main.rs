//! Prints the paths of the vendored protoc and of its include folder, a line each.
fn main() {
    let protoc = protoc_bin_vendored::protoc_bin_path();
    let include = protoc_bin_vendored::include_path();
    match (protoc, include) {
        (Ok(protoc), Ok(include)) => println!("{}\n{}", protoc.display(), include.display()),
        (protoc, include) => {
            eprintln!("no protoc for this platform: {:?} {:?}", protoc.err(), include.err());
            std::process::exit(1);
        }
    }
}
