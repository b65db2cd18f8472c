//! Black-box tests: the real binary, real sockets, a real nix. A module for each part of the promise.

mod children;
mod config;
mod frames;
mod handshakes;
mod http;
mod peers;
mod scarcity;
mod sessions;
mod shutdown;
mod support;
mod tokens;
