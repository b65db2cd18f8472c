//! Black-box tests: the real binary, real sockets, a real nix. A module for each part of the promise.

mod action;
mod admin;
mod audit;
mod builders;
mod children;
mod chroot;
mod client;
mod config;
mod docs;
mod frames;
mod handshakes;
mod http;
mod keys;
mod nix;
mod nixos;
mod peers;
mod proxies;
mod rules;
mod scarcity;
mod sessions;
mod shutdown;
mod stdio;
mod support;
mod tokens;
mod trouble;
mod trust;
