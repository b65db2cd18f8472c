//! Fuzzes compressed messages, each after a byte with its length, against zstd's own way to expand a whole stream.
#![no_main]

include!(concat!(env!("OUT_DIR"), "/main.rs"));

mod target {
    use super::copy::{Link, new_decoder};
    use libfuzzer_sys::fuzz_target;
    use std::fs::File;
    use std::io::{Write, sink};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;
    use std::sync::{Arc, LazyLock};
    use tungstenite::protocol::Role;

    static LINK: LazyLock<Link> = LazyLock::new(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = Arc::new(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        Link::new(&socket, socket.clone(), Role::Server, true).unwrap()
    });

    /// How many bytes zstd makes of a stream, if it is one.
    fn expanded(stream: &[u8]) -> Option<u64> {
        struct Counter(u64);
        impl Write for Counter {
            fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
                self.0 += bytes.len() as u64;
                sink().write(bytes)
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let mut decoder = zstd::stream::write::Decoder::new(Counter(0)).unwrap();
        decoder.window_log_max(20).unwrap();
        decoder.write_all(stream).ok()?;
        decoder.flush().ok()?;
        Some(decoder.get_ref().0)
    }

    fuzz_target!(|bytes: &[u8]| {
        let null = File::options().write(true).open("/dev/null").unwrap();
        let (mut decoder, mut rest, mut stream) = (new_decoder(), bytes, Vec::new());
        let before = LINK.received.get();
        while let Some((&length, after)) = rest.split_first() {
            let (message, after) = after.split_at(after.len().min(length.into()));
            stream.extend(message);
            if LINK.expand(&mut decoder, message, null.as_fd()).is_err() {
                return;
            }
            rest = after;
        }
        assert_eq!(Some(LINK.received.get() - before), expanded(&stream));
    });
}
