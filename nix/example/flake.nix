# A builder with its own name and certificate. `your-organisation` is your fork or mirror.
{
  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";
  inputs.nix-relay.url = "github:your-organisation/nix-relay";
  inputs.nix-relay.inputs.nixpkgs.follows = "nixpkgs";
  outputs = { nixpkgs, nix-relay, ... }: {
    nixosConfigurations.builder = nixpkgs.lib.nixosSystem {
      modules = [
        ./hardware-configuration.nix
        nix-relay.nixosModules.default
        {
          services.nix-relay = {
            enable = true;
            settings.auth.audience = "https://relay.example.com";
            settings.auth.allowed_org = "your-organisation";
            nginx.enable = true;
            nginx.domain = "relay.example.com";
          };
          networking.firewall.allowedTCPPorts = [
            80
            443
          ];
          security.acme.acceptTerms = true;
          security.acme.defaults.email = "you@example.com";
        }
      ];
    };
  };
}
