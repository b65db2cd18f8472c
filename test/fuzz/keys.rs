//! Fuzzes what an issuer publishes: a discovery document, an empty line, and a key set.
#![no_main]

include!(concat!(env!("OUT_DIR"), "/main.rs"));

mod target {
    use super::{oidc, web};
    use jwt_simple::reexports::ct_codecs::{Base64UrlSafeNoPadding, Decoder};
    use libfuzzer_sys::fuzz_target;
    use serde_json::Value;
    use std::io::{BufRead, BufReader, Write};
    use std::net::TcpListener;
    use std::sync::{LazyLock, Mutex};

    /// Discovery document and key set.
    static PUBLISHED: Mutex<(Vec<u8>, Vec<u8>)> = Mutex::new((Vec::new(), Vec::new()));

    static ISSUER: LazyLock<String> = LazyLock::new(|| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                let mut head = BufReader::new(&stream).lines().map_while(Result::ok);
                let keys = head.next().is_some_and(|line| line.contains("/jwks"));
                head.find(String::is_empty);
                let published = PUBLISHED.lock().unwrap();
                let body = if keys { &published.1 } else { &published.0 };
                let head = format!(
                    "HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                    body.len()
                );
                let _ = stream.write_all(&[head.as_bytes(), body].concat());
            }
        });
        url
    });

    /// Whether a JSON Web Key could be one to verify signatures with, as README.md has it.
    fn could_verify(key: &Value) -> bool {
        let modulus = key["n"]
            .as_str()
            .and_then(|n| Base64UrlSafeNoPadding::decode_to_vec(n, None).ok());
        let bits = modulus.map_or(0, |n| {
            let zeros = n.iter().take_while(|&&byte| byte == 0).count();
            n.get(zeros).map_or(0, |first| {
                (n.len() - zeros) * 8 - first.leading_zeros() as usize
            })
        });
        let kind = match key["kty"].as_str() {
            Some("RSA") => (2048..=4096).contains(&bits),
            Some("EC") => key["crv"] == "P-256" || key["crv"] == "P-384",
            Some("OKP") => key["crv"] == "Ed25519",
            _ => false,
        };
        kind && (key["use"].is_null() || key["use"] == "sig")
    }

    fuzz_target!(|text: &str| {
        let url = &*ISSUER;
        let (document, set) = text.split_once("\n\n").unwrap_or((text, ""));
        let document = document.replace("ISSUER", url);
        let parsed: Value = web::parse_json(document.as_bytes()).unwrap_or_default();
        let uri = parsed["jwks_uri"].as_str().unwrap_or_default();
        if web::is_https_or_loopback(uri) && uri != format!("{url}/jwks") {
            // It would go and ask there.
            return;
        }
        *PUBLISHED.lock().unwrap() = (document.into(), set.into());
        if let Ok(keys) = oidc::fetch_jwks(url) {
            assert!(parsed["issuer"] == *url && !uri.is_empty());
            let set: Value = web::parse_json(set.as_bytes()).unwrap();
            let useful = set["keys"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|key| could_verify(key))
                .count();
            assert!(
                !keys.is_empty() && keys.len() <= useful,
                "{} of {useful} in {set}",
                keys.len()
            );
        }
    });
}
