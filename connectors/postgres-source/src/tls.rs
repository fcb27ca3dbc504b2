//! What SCRAM needs of the server's certificate. How TLS is made by `sslmode` is in `wallaby-postgres-dsn`.

use sha2::{Digest, Sha256, Sha384, Sha512};
use x509_parser::prelude::FromDer;
use x509_parser::signature_algorithm::SignatureAlgorithm;

/// RFC 5929's `tls-server-end-point`: the certificate hashed with its signature's hash, MD5 and SHA-1 lifted to SHA-256.
/// `None` when the signature has no hash of its own (Ed25519), for which the RFC defines nothing.
pub(crate) fn server_end_point(certificate: &[u8]) -> Option<Vec<u8>> {
    const SHA384: &str = "2.16.840.1.101.3.4.2.2";
    const SHA512: &str = "2.16.840.1.101.3.4.2.3";
    let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(certificate).ok()?;
    let algorithm = &parsed.signature_algorithm;
    let hash = match algorithm.algorithm.to_id_string().as_str() {
        // RSA or ECDSA with SHA-384, with SHA-512.
        "1.2.840.113549.1.1.12" | "1.2.840.10045.4.3.3" => SHA384.to_owned(),
        "1.2.840.113549.1.1.13" | "1.2.840.10045.4.3.4" => SHA512.to_owned(),
        // RSA with MD5, SHA-1, SHA-256; ECDSA with SHA-1, SHA-256.
        "1.2.840.113549.1.1.4"
        | "1.2.840.113549.1.1.5"
        | "1.2.840.113549.1.1.11"
        | "1.2.840.10045.4.1"
        | "1.2.840.10045.4.3.2" => String::new(),
        "1.2.840.113549.1.1.10" => match SignatureAlgorithm::try_from(algorithm).ok()? {
            SignatureAlgorithm::RSASSA_PSS(params) => params.hash_algorithm_oid().to_id_string(),
            _ => return None,
        },
        _ => return None,
    };
    Some(match hash.as_str() {
        SHA384 => Sha384::digest(certificate).to_vec(),
        SHA512 => Sha512::digest(certificate).to_vec(),
        _ => Sha256::digest(certificate).to_vec(),
    })
}
