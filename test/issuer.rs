//! The issuer of the tests as a program: `issuer ADDRESS`, until it is killed. Prints its URL.

#[path = "support/issuer.rs"]
mod issuer;

fn main() {
    let address = std::env::args().nth(1).unwrap_or("127.0.0.1:0".into());
    let issuer = issuer::Issuer::on(&address);
    issuer::keys();
    println!("{}", issuer.url());
    loop {
        std::thread::park();
    }
}
