//! The `.proto` files of the crate, found and compiled.
use std::{
    fs,
    path::{Path, PathBuf},
};

use prost_types::FileDescriptorSet;
use protox::Compiler;

/// Packages of records on disk: generated, and no part of the descriptor set of the wire.
pub(crate) const ON_DISK: &str = "polykey.record.";

/// The directory of the crate, from which `.proto` files import one another.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every `.proto` file of the crate, by its import path, sorted.
fn files() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open: Vec<PathBuf> =
        ["common", "google", "grpc", "polykey"].iter().map(|d| root().join(d)).collect();
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else if path.extension().is_some_and(|e| e == "proto") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// All of them with their imports and comments.
pub(crate) fn compile() -> FileDescriptorSet {
    let mut compiler = Compiler::new([root()]).unwrap();
    compiler.include_imports(true).include_source_info(true).open_files(files()).unwrap();
    compiler.file_descriptor_set()
}
