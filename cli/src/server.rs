//! The connection to the controller.

use std::path::Path;
use std::time::Duration;

use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};
use wallaby_proto::v1::flow_service_client::FlowServiceClient;
use wallaby_proto::v1::operation_service_client::OperationServiceClient;
use wallaby_proto::v1::sink_service_client::SinkServiceClient;
use wallaby_proto::v1::snapshot_service_client::SnapshotServiceClient;
use wallaby_proto::v1::verify_service_client::VerifyServiceClient;
use wallaby_proto::v1::worker_service_client::WorkerServiceClient;

use crate::args::Global;
use crate::failure::Failure;

/// Answers above this are refused: 1000 flows with all their sinks are far below.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// A connected controller.
#[derive(Clone)]
pub struct Server {
    channel: Channel,
    address: String,
    timeout: Duration,
}

impl Server {
    /// Connects.
    pub async fn connect(global: &Global) -> Result<Server, Failure> {
        let address = with_scheme(&global.server);
        let invalid = |cause: String| Failure::Invalid(format!("--server {}: {cause}", global.server));
        let mut endpoint = Endpoint::from_shared(address.clone())
            .map_err(|_| invalid("not an address: write host:port or https://host:port".to_owned()))?
            .connect_timeout(global.timeout.min(Duration::from_secs(5)))
            .http2_keep_alive_interval(Duration::from_secs(10))
            .keep_alive_timeout(Duration::from_secs(10))
            .keep_alive_while_idle(true);
        // The transport would leave such a port out and ask another one.
        if let Some(port) = endpoint.uri().authority().and_then(|authority| wrong_port(authority.as_str())) {
            return Err(invalid(format!("`{port}` is not a port: write a number from 1 to 65535")));
        }
        if address.starts_with("https://") {
            endpoint = endpoint.tls_config(tls(global)?).map_err(|error| invalid(chain(&error)))?;
        }
        let channel = endpoint.connect().await.map_err(|error| Failure::unreachable(&address, &chain(&error)))?;
        Ok(Server { channel, address, timeout: global.timeout })
    }

    /// Flows.
    pub fn flows(&self) -> FlowServiceClient<Channel> {
        FlowServiceClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX)
    }

    /// Sinks.
    pub fn sinks(&self) -> SinkServiceClient<Channel> {
        SinkServiceClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX)
    }

    /// Snapshot runs.
    pub fn snapshots(&self) -> SnapshotServiceClient<Channel> {
        SnapshotServiceClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX)
    }

    /// Workers.
    pub fn workers(&self) -> WorkerServiceClient<Channel> {
        WorkerServiceClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX)
    }

    /// Comparisons.
    pub fn verify(&self) -> VerifyServiceClient<Channel> {
        VerifyServiceClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX)
    }

    /// Operations.
    pub fn operations(&self) -> OperationServiceClient<Channel> {
        OperationServiceClient::new(self.channel.clone()).max_decoding_message_size(ANSWER_BYTES_MAX)
    }

    /// A request with the deadline that the user chose.
    pub fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request.set_timeout(self.timeout);
        request
    }

    /// What the server's answer means to the user.
    pub fn failure(&self, status: &tonic::Status) -> Failure {
        Failure::from_status(status, &self.address)
    }
}

/// What stands behind the host's colon and is no port.
fn wrong_port(authority: &str) -> Option<&str> {
    let host = authority.rsplit('@').next().unwrap_or(authority);
    let (_, port) = host[host.rfind(']').unwrap_or(0)..].rsplit_once(':')?;
    (!port.parse::<u16>().is_ok_and(|port| port > 0)).then_some(port)
}

fn with_scheme(server: &str) -> String {
    if server.contains("://") { server.to_owned() } else { format!("http://{server}") }
}

fn tls(global: &Global) -> Result<ClientTlsConfig, Failure> {
    let Some(ca) = &global.ca_cert else {
        return Err(Failure::Invalid(
            "https needs --ca-cert: the authority that signed the controller's certificate".to_owned(),
        ));
    };
    let mut config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(read(ca)?));
    if let (Some(certificate), Some(key)) = (&global.client_cert, &global.client_key) {
        config = config.identity(Identity::from_pem(read(certificate)?, read(key)?));
    }
    Ok(config)
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    std::fs::read(path).map_err(|error| Failure::Invalid(format!("cannot read {}: {error}", path.display())))
}

/// An error with its causes, the innermost last: the transport's own message says only "transport error".
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_cannot_be_one_is_named() {
        for (authority, port) in
            [("h:99999", "99999"), ("h:x", "x"), ("[::1]:65536", "65536"), ("u:p@h:0", "0"), ("h:", "")]
        {
            assert_eq!(wrong_port(authority), Some(port), "{authority}");
        }
        for authority in ["h:7117", "h", "[::1]:7117", "[::1]", "u:p@h", "h:65535"] {
            assert_eq!(wrong_port(authority), None, "{authority}");
        }
    }
}
