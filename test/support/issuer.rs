//! An OIDC issuer that speaks HTTP: discovery, key set, and a token endpoint like that of GitHub
//! Actions. Its tokens can be as wrong as a test wants them.
#![allow(dead_code, reason = "each program that shares this uses its own part")]

use jwt_simple::prelude::*;
use p256::ecdsa::{Signature, SigningKey, signature::Signer as _};
use serde_json::{Map, Value, json};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{SystemTime, UNIX_EPOCH};
use superboring::{hash::MessageDigest, pkey::PKey, rsa::Padding, sign::Signer};

/// What a job presents to the token endpoint (`ACTIONS_ID_TOKEN_REQUEST_TOKEN`).
pub const REQUEST_TOKEN: &str = "request-token-of-the-job";
pub const AUDIENCE: &str = "api://nix-relay";
pub const ORG: &str = "example-org";

/// Generated once: making an RSA key takes a while.
pub struct Keys {
    pub rsa: RS256KeyPair,
    pub p256: ES256KeyPair,
    pub p384: ES384KeyPair,
    pub ed25519: Ed25519KeyPair,
    /// In no key set.
    pub unpublished: ES256KeyPair,
}

pub fn keys() -> &'static Keys {
    static KEYS: OnceLock<Keys> = OnceLock::new();
    KEYS.get_or_init(|| Keys {
        rsa: RS256KeyPair::generate(2048).unwrap().with_key_id("rsa"),
        p256: ES256KeyPair::generate().with_key_id("p256"),
        p384: ES384KeyPair::generate().with_key_id("p384"),
        ed25519: Ed25519KeyPair::generate().with_key_id("ed25519"),
        unpublished: ES256KeyPair::generate().with_key_id("unpublished"),
    })
}

/// The public keys, as they are published: RSA, P-256, P-384, Ed25519.
pub fn published() -> [Value; 4] {
    let keys = keys();
    let (p256, p384) = (
        keys.p256.public_key().to_jwk(),
        keys.p384.public_key().to_jwk(),
    );
    let all = [
        keys.rsa.public_key().to_jwk(),
        p256,
        p384,
        keys.ed25519.public_key().to_jwk(),
    ];
    all.map(|key| jwk(&key, json!({})))
}

pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
}

/// Claims as they are, with nothing added or checked.
pub fn raw_claims(claims: &Value) -> JWTClaims<Map<String, Value>> {
    let custom = claims.as_object().unwrap().clone();
    let mut all = Claims::with_custom_claims(custom, Duration::from_secs(1));
    (all.issued_at, all.expires_at, all.invalid_before) = (None, None, None);
    all
}

pub fn encode(bytes: impl AsRef<[u8]>) -> String {
    Base64UrlSafeNoPadding::encode_to_string(bytes).unwrap()
}

/// The signature of ES256 over two parts of a token, whatever they are.
pub fn es256(key: &ES256KeyPair, parts: &str) -> Signature {
    AsRef::<SigningKey>::as_ref(key.key_pair()).sign(parts.as_bytes())
}

/// A token of two parts, whatever they are, that are signed well.
pub fn signed(key: &ES256KeyPair, header: &str, payload: &str) -> String {
    let parts = format!("{header}.{payload}");
    let signature = encode(es256(key, &parts).to_bytes());
    format!("{parts}.{signature}")
}

/// The same with the RSA key and SHA-256; `PKCS1` for RS256, `PKCS1_PSS` for PS256.
pub fn signed_by_rsa(padding: Padding, header: &str, payload: &str) -> String {
    let parts = format!("{header}.{payload}");
    let key = PKey::from_rsa(keys().rsa.key_pair().as_ref().clone()).unwrap();
    let mut signer = Signer::new(MessageDigest::sha256(), &key).unwrap();
    signer.set_rsa_padding(padding).unwrap();
    signer.update(parts.as_bytes()).unwrap();
    format!("{parts}.{}", encode(signer.sign_to_vec().unwrap()))
}

/// A published key as JSON, changed; null takes a member away.
pub fn jwk(key: &str, changes: Value) -> Value {
    changed(serde_json::from_str(key).unwrap(), changes)
}

fn changed(mut object: Value, changes: Value) -> Value {
    for (name, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => drop(object.as_object_mut().unwrap().remove(name)),
            value => object[name] = value.clone(),
        }
    }
    object
}

/// What a path answers: a status, header lines, and a body.
#[derive(Clone)]
struct Answer(u16, Vec<String>, Vec<u8>);

/// A running issuer; dropped, it stops.
pub struct Issuer {
    server: Arc<tiny_http::Server>,
    answers: Arc<Mutex<HashMap<String, Answer>>>,
    delays: Arc<Mutex<HashMap<String, std::time::Duration>>>,
    requests: Arc<Mutex<Vec<String>>>,
    headers: Arc<Mutex<Vec<String>>>,
}

impl Issuer {
    pub fn start() -> Issuer {
        Issuer::on("127.0.0.1:0")
    }

    pub fn on(address: &str) -> Issuer {
        let server = Arc::new(tiny_http::Server::http(address).unwrap());
        let issuer = Issuer {
            server,
            answers: Arc::default(),
            delays: Arc::default(),
            requests: Arc::default(),
            headers: Arc::default(),
        };
        let (server, answers, delays) = (
            issuer.server.clone(),
            issuer.answers.clone(),
            issuer.delays.clone(),
        );
        let (requests, url) = (issuer.requests.clone(), issuer.url());
        let headers = issuer.headers.clone();
        std::thread::spawn(move || {
            for request in server.incoming_requests() {
                let path = request.url().split('?').next().unwrap().to_owned();
                requests.lock().unwrap().push(request.url().to_owned());
                let lines = request.headers().iter().map(|line| line.to_string());
                headers.lock().unwrap().extend(lines);
                let wrong = answers.lock().unwrap().get(&path).cloned();
                let Answer(status, lines, body) = wrong.unwrap_or_else(|| {
                    let (status, body) = respond(&url, &path, &request);
                    Answer(status, vec![], body.into())
                });
                let mut response = tiny_http::Response::from_data(body).with_status_code(status);
                for line in lines {
                    response.add_header(line.parse::<tiny_http::Header>().unwrap());
                }
                let delay = delays
                    .lock()
                    .unwrap()
                    .get(&path)
                    .copied()
                    .unwrap_or_default();
                std::thread::spawn(move || {
                    std::thread::sleep(delay);
                    let _ = request.respond(response);
                });
            }
        });
        issuer
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.server.server_addr())
    }

    /// From now on, what a path answers; the body of a redirect is where it leads.
    pub fn answer(&self, path: &str, status: u16, body: &str) {
        let location = format!("Location: {body}");
        let lines: &[&str] = if status / 100 == 3 { &[&location] } else { &[] };
        self.answer_with(path, status, lines, body);
    }

    /// The same with header lines and a body of any bytes.
    pub fn answer_with(&self, path: &str, status: u16, lines: &[&str], body: impl Into<Vec<u8>>) {
        let lines = lines.iter().map(|line| line.to_string()).collect();
        let answer = Answer(status, lines, body.into());
        self.answers.lock().unwrap().insert(path.into(), answer);
    }

    /// From now on, how long a path's answers take.
    pub fn slow(&self, path: &str, delay: std::time::Duration) {
        self.delays.lock().unwrap().insert(path.into(), delay);
    }

    /// The paths and queries of all requests so far.
    pub fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }

    /// From now on, as if nobody had asked for anything.
    pub fn forget(&self) {
        self.requests.lock().unwrap().clear();
    }

    /// The header lines of all requests so far.
    pub fn headers(&self) -> Vec<String> {
        self.headers.lock().unwrap().clone()
    }

    /// The claims of a good token, changed as `changes` says; null takes a claim away.
    pub fn claims(&self, changes: Value) -> Value {
        changed(claims(&self.url(), AUDIENCE), changes)
    }

    /// A good token.
    pub fn token(&self) -> String {
        self.token_with(json!({}))
    }

    /// A signed token with claims changed, as of `claims`.
    pub fn token_with(&self, changes: Value) -> String {
        keys().p256.sign(raw_claims(&self.claims(changes))).unwrap()
    }
}

impl Drop for Issuer {
    fn drop(&mut self) {
        self.server.unblock();
    }
}

fn claims(issuer: &str, audience: &str) -> Value {
    json!({
        "iss": issuer,
        "aud": audience,
        "sub": format!("repo:{ORG}/project:ref:refs/heads/main"),
        "repository": format!("{ORG}/project"),
        "repository_owner": ORG,
        "ref": "refs/heads/main",
        "iat": now(),
        "nbf": now(),
        "exp": now() + 300,
    })
}

fn respond(url: &str, path: &str, request: &tiny_http::Request) -> (u16, String) {
    let answer = match path {
        "/.well-known/openid-configuration" => {
            json!({"issuer": url, "jwks_uri": format!("{url}/jwks")})
        }
        "/jwks" => json!({"keys": published()}),
        "/token" => {
            let bearer = format!("Bearer {REQUEST_TOKEN}");
            let allowed = request
                .headers()
                .iter()
                .any(|h| h.field.equiv("Authorization") && h.value.as_str() == bearer);
            let audience = request
                .url()
                .split(['?', '&'])
                .find_map(|p| p.strip_prefix("audience="));
            match (allowed, audience) {
                (true, Some(audience)) => {
                    let audience = audience.replace("%3A", ":").replace("%2F", "/");
                    let audience = audience.replace("%3a", ":").replace("%2f", "/");
                    let claims = raw_claims(&claims(url, &audience));
                    json!({"value": keys().rsa.sign(claims).unwrap()})
                }
                _ => return (401, "{\"message\": \"no\"}".into()),
            }
        }
        _ => return (404, "{}".into()),
    };
    (200, answer.to_string())
}
