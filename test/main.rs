//! Black-box tests: the real binary, real sockets, a real nix. A module for each part of the promise.

mod config;
mod http;
mod support;
mod tokens;
