//! Black-box tests: the real binary, real sockets, a real nix. A module for each part of the promise.

mod children;
mod client;
mod config;
mod frames;
mod handshakes;
mod http;
mod nix;
mod peers;
mod scarcity;
mod sessions;
mod shutdown;
mod support;
mod tokens;
