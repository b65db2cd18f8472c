//! Fuzzes a request head, its Authorization, and the answer to its upgrade.
#![no_main]

include!(concat!(env!("OUT_DIR"), "/main.rs"));

mod target {
    use super::http::{Answer, Head};
    use libfuzzer_sys::fuzz_target;

    /// All that the relay takes from a head.
    fn seen(head: &Head) -> String {
        let (switching, token) = (
            head.upgrade_response().map_err(status),
            head.token().map_err(status),
        );
        format!("{:?} {switching:?} {token:?}", head.request)
    }

    /// An answer is a line of its own, whatever the client sent.
    fn status(answer: Answer) -> u16 {
        assert!(
            [400, 401, 426, 431].contains(&answer.status.0),
            "{}",
            answer.status.0
        );
        assert!(!answer.line.contains(char::is_control), "{:?}", answer.line);
        answer.status.0
    }

    fuzz_target!(|bytes: &[u8]| {
        match Head::parse(bytes).map_err(status) {
            Ok(Some(head)) => {
                let length = bytes.len() - head.rest.len();
                assert_eq!(head.rest, bytes[length..]);
                // The same if it comes in two parts, and if nothing comes behind it.
                for cut in (0..length).step_by(length / 16 + 1) {
                    assert!(
                        matches!(Head::parse(&bytes[..cut]), Ok(None)),
                        "a head of {cut} bytes"
                    );
                }
                let alone = Head::parse(&bytes[..length]).ok().flatten();
                assert_eq!(alone.map(|alone| seen(&alone)), Some(seen(&head)));
                if let Ok(switching) = head.upgrade_response() {
                    let text = std::str::from_utf8(&switching).unwrap();
                    assert!(
                        text.starts_with("HTTP/1.1 101 ")
                            && text.find("\r\n\r\n") == Some(text.len() - 4)
                    );
                    assert!(text.lines().count() <= 6, "{text}");
                    assert!(head.request.headers().contains_key("sec-websocket-key"));
                }
                if head.token().is_ok() {
                    assert_eq!(
                        head.request
                            .headers()
                            .get_all("authorization")
                            .iter()
                            .count(),
                        1
                    );
                }
            }
            Ok(None) => {}
            // Whatever comes next does not mend it.
            Err(_) => assert!(Head::parse(&[bytes, b"\r\n\r\n"].concat()).is_err()),
        }
    });
}
