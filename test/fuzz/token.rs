//! Fuzzes a token against a fixed key set: a text in which the parts of a good token may be named, or, if it has two
//! lines, a header and claims, which are signed as a good token is.
#![no_main]

include!(concat!(env!("OUT_DIR"), "/main.rs"));

#[path = "../support/issuer.rs"]
mod issuer;

mod target {
    use super::http::Answer;
    use super::oidc::{self, Issuers, Verdict};
    use super::{config, issuer, poll};
    use jwt_simple::algorithms::EdDSAKeyPairLike;
    use jwt_simple::reexports::ct_codecs::{Base64UrlSafeNoPadding, Encoder};
    use libfuzzer_sys::fuzz_target;
    use serde_json::Value;
    use std::sync::LazyLock;
    use std::time::{Duration, Instant};

    struct Stage {
        url: String,
        good: String,
        issuers: Issuers,
        _published: issuer::Issuer,
    }

    static STAGE: LazyLock<Stage> = LazyLock::new(|| {
        let published = issuer::Issuer::start();
        let url = published.url();
        let file = std::env::temp_dir().join(format!("nix-relay-fuzz-{}", std::process::id()));
        std::fs::write(
            &file,
            format!("[auth]\nallowed_org = \"x\"\nissuer = \"{url}\""),
        )
        .unwrap();
        let config = config::load(file.to_str()).unwrap();
        std::fs::remove_file(file).unwrap();
        let stage = Stage {
            good: signed(
                r#"{"alg":"EdDSA","kid":"ed25519"}"#,
                &published
                    .claims(serde_json::json!({"exp": 1u64 << 32}))
                    .to_string(),
            ),
            issuers: Issuers::new(&config).unwrap(),
            url,
            _published: published,
        };
        stage.issuers.start().unwrap();
        assert!(verify(&stage.issuers, &stage.good).is_ok());
        stage
    });

    /// As the relay does it.
    fn verify(issuers: &Issuers, token: &str) -> Result<(), Answer> {
        let came = Instant::now();
        let until = came + Duration::from_secs(10);
        while let Verdict::NeedsKeys(fetched, _place) = issuers.verify(token, came)? {
            if Instant::now() >= until {
                return Err(oidc::no_keys("they did not come in time"));
            }
            poll::ready([fetched.poll_fd()], Some(until));
        }
        Ok(())
    }

    fn base64(bytes: impl AsRef<[u8]>) -> String {
        Base64UrlSafeNoPadding::encode_to_string(bytes).unwrap()
    }

    fn signed(header: &str, claims: &str) -> String {
        let signed = format!("{}.{}", base64(header), base64(claims));
        let signature = issuer::keys()
            .ed25519
            .key_pair()
            .as_ref()
            .sk
            .sign(&signed, None);
        format!("{signed}.{}", base64(signature.as_ref()))
    }

    /// What README.md says is checked, by other means.
    fn may_pass(header: &str, claims: &str) -> bool {
        let (header, claims): (Value, Value) =
            match (serde_json::from_str(header), serde_json::from_str(claims)) {
                (Ok(header), Ok(claims)) => (header, claims),
                _ => return false,
            };
        let holds = |value: &Value| value == issuer::AUDIENCE;
        let time = |name: &str| claims[name].as_f64();
        let now = issuer::now() as f64;
        header["alg"] == "EdDSA"
            && (header["kid"].is_null() || header["kid"] == "ed25519")
            && claims["iss"] == STAGE.url
            && (holds(&claims["aud"])
                || claims["aud"]
                    .as_array()
                    .is_some_and(|all| all.iter().any(holds)))
            && time("exp").is_some_and(|at| at >= now - 61.0)
            && ["nbf", "iat"]
                .iter()
                .all(|name| time(name).is_none_or(|at| at <= now + 61.0))
    }

    fuzz_target!(|text: &str| {
        let (token, may_pass) = match text.split_once('\n') {
            Some((header, claims)) => {
                let claims = claims.replace("ISSUER", &STAGE.url);
                (signed(header, &claims), may_pass(header, &claims))
            }
            None => {
                let parts: Vec<_> = STAGE.good.split('.').collect();
                let token = text
                    .replace("HEADER", parts[0])
                    .replace("CLAIMS", parts[1])
                    .replace("SIGNATURE", parts[2]);
                let good = token == STAGE.good;
                (token, good)
            }
        };
        match verify(&STAGE.issuers, &token) {
            Ok(_) => assert!(may_pass, "{token}"),
            Err(answer) => {
                // 503: a key that the issuer may have published since it was asked.
                assert!([401, 503].contains(&answer.status.0), "{}", answer.status.0);
                assert!(!answer.line.contains(char::is_control), "{:?}", answer.line);
                // No word of the answer is as long.
                let secret = |part: &&str| {
                    part.len() > 20 && !part.contains(' ') && answer.line.contains(*part)
                };
                assert_eq!(token.split('.').find(secret), None, "{}", answer.line);
            }
        }
    });
}
